"""Programs that make models, send requests and measure. Not installed with the package."""
