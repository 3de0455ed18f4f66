"""The bundled demo models, and the scripts that made them."""
