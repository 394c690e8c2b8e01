#!/usr/bin/env python3
"""Drives the chat page of a running `tinyllama serve` in headless Chromium.

    python scripts/check_page.py http://127.0.0.1:8000/ [--shots DIR]

Needs `pip install selenium` and Chromium with its driver (Debian: `chromium`, `chromium-driver`). Types, streams, stops,
reloads, edits, switches conversations and themes, on wide and narrow screens. A model that answers in less than half a
second is too fast to be stopped: then that step is left out.
"""

import argparse
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


def browser(width, height, dark=False):
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options)
    scheme = "dark" if dark else "light"
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return driver


class Page:
    def __init__(self, driver, url, shots):
        self.driver, self.shots = driver, shots
        driver.get(url)
        self.until(lambda: "tokens" in self.text("#model"), "the model's name")

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).get_attribute("textContent")

    def until(self, condition, what, seconds=60):
        WebDriverWait(self.driver, seconds, 0.05, ignored_exceptions=[Exception]).until(
            lambda _: condition(), f"{what} never came"
        )

    def key(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def send(self, text):
        self.one("#input").send_keys(text, Keys.ENTER)

    def idle(self):
        self.until(lambda: self.text("#send") == "Send", "the end of the answer")

    def answers(self):
        script = "return [...document.querySelectorAll('.turn.assistant .text')].map(e => e.innerText)"
        return self.driver.execute_script(script)

    def shot(self, name):
        if self.shots:
            self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def check_log(self):
        bad = [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert not bad, bad


def check(condition, what):
    assert condition, what
    print("ok:", what)


def wide(page):
    page.shot("1-welcome")
    page.one("#input").send_keys("What do llamas eat?", Keys.SHIFT, Keys.ENTER)
    check("\n" in page.one("#input").get_attribute("value"), "Shift+Enter breaks the line")
    page.send("Tell me more than one thing.")
    page.until(lambda: page.answers() and page.answers()[-1], "the first text")
    check(page.one("#input").get_attribute("value") == "", "Enter sends")
    if page.text("#send") == "Stop":
        page.shot("2-streaming")
        page.key(Keys.ESCAPE)
        page.idle()
        check("stopped" in page.text(".turn.assistant .foot"), "Esc stops the answer")
        page.one(".turn.assistant .foot button:last-of-type").click()  # Try again
    page.idle()
    check("tok/s" in page.text(".turn.assistant .stats"), "speed is shown")
    check(page.text("#status").startswith("Answer: "), "the whole answer is announced once")
    page.send("And a second question")
    page.idle()
    page.shot("3-two-turns")
    check(len(page.all(".turn")) == 4, "two turns of each")
    html = page.one("#log").get_attribute("innerHTML")
    check("<script" not in html.lower(), "text does not become HTML")
    before = page.answers()
    page.driver.refresh()
    page.until(lambda: len(page.all(".turn")) == 4, "the conversation after reload")
    check(page.answers() == before, "reload keeps the conversation")
    webdriver.ActionChains(page.driver).key_down(Keys.ALT).send_keys("n").key_up(Keys.ALT).perform()
    page.until(lambda: not page.all(".turn"), "an empty conversation")
    check(page.driver.switch_to.active_element.get_attribute("id") == "input", "Alt+N starts a chat")
    page.send("Another conversation")
    page.idle()
    check(len(page.all("#chats li")) == 2, "two conversations are listed")
    page.all("#chats .open")[1].click()
    page.until(lambda: len(page.all(".turn")) == 4, "the first conversation")
    edit = page.one(".turn.user .foot button")
    page.driver.execute_script("arguments[0].click()", edit)
    page.one("#input").send_keys(" Edited.")
    page.shot("4-editing")
    page.one("#input").send_keys(Keys.ENTER)
    page.idle()
    check(len(page.all(".turn")) == 2 and "Edited." in page.text(".turn.user"), "editing drops what followed")
    page.one("#settings").click()
    page.one("[name=system]").send_keys("Answer in verse.")
    page.one("[name=seed]").send_keys("7")
    page.shot("5-settings")
    page.one("#options .primary").click()
    page.driver.execute_script(
        "window.sent = null; const f = fetch; window.fetch = (u, o) => { window.sent = o.body; return f(u, o); }"
    )
    page.send("With settings")
    page.idle()
    sent = page.driver.execute_script("return JSON.parse(window.sent)")
    check(sent["seed"] == 7 and sent["messages"][0]["role"] == "system", "settings reach the server")
    page.one("#theme").click()
    page.one("#theme").click()
    colour = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    check(page.text("#theme") == "Theme: dark" and colour == "rgb(25, 27, 25)", "the switch makes it dark")
    page.shot("6-dark-by-switch")
    page.one("#settings").click()
    page.shot("7-dark-settings")
    page.key(Keys.ESCAPE)
    unlabelled = page.driver.execute_script(
        "return [...document.querySelectorAll('button,input,textarea')]"
        ".filter(e => !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).map(e => e.outerHTML)"
    )
    check(not unlabelled, f"every control has a name {unlabelled or ''}")


def narrow(page):
    page.shot("8-narrow-dark")
    page.send("What do llamas eat?")
    page.idle()
    page.shot("9-narrow-answer")
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    check(width <= 390, f"nothing is wider than a phone ({width} px)")
    page.one("#menu").click()
    time.sleep(0.4)
    check(page.one("#new").is_displayed(), "the list of conversations opens")
    page.shot("10-narrow-list")
    page.key(Keys.ESCAPE)
    time.sleep(0.4)
    check(not page.one("#new").is_displayed(), "Esc closes it")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    args = parser.parse_args()
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    for act, size in ((wide, (1200, 800, False)), (narrow, (390, 780, True))):
        driver = browser(*size)
        try:
            page = Page(driver, args.url, args.shots)
            act(page)
            page.check_log()
        finally:
            driver.quit()
    print("the page works")


if __name__ == "__main__":
    main()
