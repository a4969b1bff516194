"""Models under test that are not loaded from weights, and features that are kept between runs."""
