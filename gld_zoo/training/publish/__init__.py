"""From a finished run to a folder for the hub."""
