"""What the app says, in the languages that it speaks."""

LANGUAGES = ("en", "zh")

CHINESE = {
    "Draw": "绘制",
    "Redraw": "重绘",
    "Why": "为什么",
    "Runs": "训练",
    "Prompts, one a line": "提示词，每行一个",
    "Negative prompt": "反向提示词",
    "Seed": "种子",
    "Steps": "步数",
    "Guidance scale": "引导强度",
    "Sampler": "采样器",
    "Guider": "引导方式",
    "Stop": "停止",
    "Image": "图片",
    "Images": "图片",
    "What the network expects": "网络此刻预计的图片",
    "The same as a command": "等价的命令",
    "Drop an image from here to get its settings": "拖入这里画的图片，取回它的设置",
    "Paint over what is to be drawn anew": "涂抹要重画的部分",
    "Strength": "强度",
    "Times each step is taken": "每步重复次数",
    "Prompt": "提示词",
    "Also without each word": "再看去掉每个词的结果",
    "Ask": "提问",
    "Word": "词",
    "Where it was read": "它在哪里被读到",
    "What changes without it": "去掉它会怎样",
    "Step": "步",
    "Run": "训练",
    "Look again": "刷新",
    "Newest samples": "最新样图",
    "Loss": "损失",
    "Stop and save": "停止并保存",
    "Save now": "立即保存",
    "Sample now": "立即采样",
    "Resume": "继续",
    "trains": "正在训练",
    "does not train": "没有在训练",
    "done": "已完成",
    "asked": "已请求",
    "starts": "正在启动",
    "No run yet in": "还没有训练：",
    "Open the address with its token to stop or start runs.": "要停止或启动训练，请用带 token 的地址打开。",
    "Nothing to draw.": "没有要画的内容。",
    "This image holds no settings.": "这张图片里没有设置。",
}


def speaker(language: str):
    """A function that says an English text in a language.

    Raises:
        ValueError: a language that the app does not speak.
    """
    if language not in LANGUAGES:
        raise ValueError(f"--language {language}: {' or '.join(LANGUAGES)}")
    return (lambda text: CHINESE.get(text, text)) if language == "zh" else (lambda text: text)
