"""The embedded default: shipped data, the program that makes it, and a programmatic gold scorer."""
