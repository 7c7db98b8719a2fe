"""The phantom: subjects with template anatomy and drawn lesions, for users without data."""
