"""Measurements of the whole: what protecting a model costs against running it in the clear."""
