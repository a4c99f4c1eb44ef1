"""Systems side by side on any data set: what they tell and draw, scored, with a report."""
