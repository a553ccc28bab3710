"""What every room may use: errors, the disk, devices and signals."""
