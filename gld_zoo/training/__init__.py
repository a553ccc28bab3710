"""The trainer, from a command to a published model; it works with the extra `train`.

Rooms, each importing only those below it: commands; publish; measure, tasks; engine, build; data,
runs; config, common.
"""
