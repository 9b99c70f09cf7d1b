"""What can be wrong with CT data."""


class UndecodableSlice(Exception):
    """One slice's pixels cannot be read; the rest of its series may be fine."""
