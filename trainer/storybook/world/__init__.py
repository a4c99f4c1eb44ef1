"""The storybook's world: states, stories and pictures made by rule, and the data source made of them."""
