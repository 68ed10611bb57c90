"""The commands and their settings, without JAX, so that what a user types is answered at once.

A command's class of settings is in the module with its name; its own module, above, has `main(settings)`.
"""
