"""The page to work on, `esd-lora ui`: erasers tried, made, stacked and measured in a browser, on this machine alone."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
