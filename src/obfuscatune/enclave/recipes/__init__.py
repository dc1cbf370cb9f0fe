"""How a block is keyed, shipped and replaced, by where its parts run: one recipe for each placement."""
