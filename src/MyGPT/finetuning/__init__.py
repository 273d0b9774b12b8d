"""A trained model made to do one thing well."""
