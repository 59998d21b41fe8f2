"""Two releases on one machine: processes of either, and what the first one wrote."""
