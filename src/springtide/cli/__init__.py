"""The command line: assembles the rooms and is thin. Decides nothing that a room could decide."""
