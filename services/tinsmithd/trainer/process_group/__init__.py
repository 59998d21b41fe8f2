"""The processes of a rank group: who starts them, how they meet, and whether they all live."""
