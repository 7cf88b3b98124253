"""What every step needs and that names no step."""
