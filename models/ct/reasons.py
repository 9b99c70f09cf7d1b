"""Why files and slices are set aside, and what a UID is: words that leave the process, readable without pydicom."""

import re
from enum import StrEnum

# PS3.5 9.1: at most 64 characters, digits and single dots. It names files here, so nothing else may pass.
UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(\.[0-9]+)*")


class Reason(StrEnum):
    """Why a file or slice was set aside: stable words that programs may compare."""

    NOT_DICOM = "not_dicom"
    UNREADABLE_HEADER = "unreadable_header"
    NOT_CT = "not_ct"
    INVALID_UID = "invalid_uid"
    MULTIFRAME = "multiframe"
    NOT_A_VOLUME = "not_a_volume"
    NOT_HU = "not_hu"
    LOCALIZER = "localizer"
    SECONDARY_CAPTURE = "secondary_capture"
    BURNED_IN = "burned_in"
    NO_PIXELS = "no_pixels"
    NOT_GRAYSCALE = "not_grayscale"
    NO_POSITION = "no_position"
    NOT_AXIAL = "not_axial"
    BAD_RESCALE = "bad_rescale"
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    NOT_PSEUDONYMISED = "not_pseudonymised"
    UNDECODABLE = "undecodable"
    NO_VOLUME = "no_volume"
    ORIENTATION_DIFFERS = "orientation_differs"
    DUPLICATE_POSITION = "duplicate_position"
    OVERLAPPING_STACK = "overlapping_stack"
    SERIES_OF_ANOTHER_PATIENT = "series_of_another_patient"
    SYMLINK = "symlink"
    NOT_A_FILE = "not_a_file"
    UNREADABLE_FILE = "unreadable_file"
    VANISHED = "vanished"
    CHANGED = "changed"
