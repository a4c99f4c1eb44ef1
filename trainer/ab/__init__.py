"""The paper's human study: raters compare two systems' stories side by side, not knowing which is which."""
