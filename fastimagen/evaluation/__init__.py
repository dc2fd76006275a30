"""How well images match their captions."""
