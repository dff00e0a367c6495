"""The control process: registry, engines' supervision, reconciling, and every route that is not inference."""
