"""An extension of griffe, which reads the docstrings for the site: examples are a section."""

import re

from griffe import Extension


class ExampleSections(Extension):
    """Rename the heading of examples to the one that griffe knows, which shows them as code."""

    def on_object(self, *, obj, **kwargs):
        """Rename it in the docstring of a module, class or function."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE
            )
