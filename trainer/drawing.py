"""What drawings share."""

import re
from pathlib import Path

# Fonts with Chinese characters of Linux, macOS and Windows.
CHINESE_FONTS = re.compile(
    r"NotoSansCJK|NotoSansSC|SourceHanSans|wqy-|WenQuanYi|DroidSansFallback|"
    r"msyh|simhei|PingFang|STHeiti"
)


def chinese_font():
    """A matplotlib font with Chinese characters, or None where the system has none."""
    from matplotlib import font_manager

    found = [path for path in font_manager.findSystemFonts() if CHINESE_FONTS.search(Path(path).name)]
    regular = [path for path in found if "Regular" in path] or found
    return font_manager.FontProperties(fname=regular[0]) if regular else None
