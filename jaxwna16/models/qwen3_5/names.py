"""How files call what the definition has."""

NAMES = {r"^model\.language_model\.": "model."}
"""The text model beside others is `model.language_model`, alone it is `model`."""
