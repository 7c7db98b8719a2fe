"""Lesions in arrays: methods, maps, calibrations, masks."""
