"""The parts of the report's page: markup, plots, tables, and the style and script they share."""
