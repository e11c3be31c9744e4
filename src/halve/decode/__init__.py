"""One token after another: the engines that run a decode step, and text from them."""
