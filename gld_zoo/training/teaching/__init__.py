"""What a teacher answers, kept: it is asked once for each view of each image."""
