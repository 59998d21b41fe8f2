"""What all servers and clients of the wire share: channels, calls before a servicer, errors."""
