"""Programs that people write instead of using rar, run as processes of their own by `rar bench peers`; nothing imports them."""
