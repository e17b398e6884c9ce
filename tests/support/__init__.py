"""What tests share and are not tests themselves: inputs, backends, tools, stand-ins."""
