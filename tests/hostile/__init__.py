"""A campaign against marlin: damaged and hostile inputs by kind, each in a process with limits, and what came of them."""
