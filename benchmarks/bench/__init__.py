"""`make bench`: what routing gains and costs against stock vLLM, measured in the same run."""
