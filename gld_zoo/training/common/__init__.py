"""What the rooms above share: errors, the disk, devices and signals."""
