"""An index served to other programs and to people: REST interface, web page, and the client in Python."""
