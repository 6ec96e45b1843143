"""What holds for the tests of every folder."""

from hypothesis import settings

# A machine under load is slow now and then, which is no failure.
settings.register_profile("podspan", deadline=None, print_blob=True)
settings.load_profile("podspan")
