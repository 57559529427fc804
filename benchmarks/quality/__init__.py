"""Quality: the same questions asked of dense, routed and downsampled servers, scored and compared."""
