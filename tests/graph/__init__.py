"""The graph pass against torch: traced, planned, fused, proven, and compared with the module itself."""
