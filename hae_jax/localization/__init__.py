"""Lesion localization in arrays: methods, anomaly maps, calibrations and masks."""
