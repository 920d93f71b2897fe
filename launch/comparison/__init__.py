"""Several configurations under one budget: trained, measured alike, and laid side by side."""
