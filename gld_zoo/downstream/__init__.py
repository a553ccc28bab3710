"""SSD300 and DeepLabV3+ on any timm backbone."""
