"""The published method as a scale model: many objectives on one small task family, compared fairly on a CPU."""
