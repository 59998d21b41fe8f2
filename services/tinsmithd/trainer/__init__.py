"""The program that runs as a rank: it carries out the Training server's commands on an engine."""
