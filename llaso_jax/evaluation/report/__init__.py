"""The report: one HTML page that needs no network, with plots drawn as SVG."""
