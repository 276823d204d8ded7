"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, text) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const data = JSON.parse(byId("data").textContent);
  const [model, file, items] = [byId("model"), byId("file"), byId("items")];

  const fill = (select, names) => {
    const before = select.value;
    select.replaceChildren(...names.map((name) => make("option", name)));
    if (names.includes(before)) select.value = before;
  };

  const difference = (parts) => {
    const tags = { equal: "span", delete: "del", insert: "ins" };
    const all = make("span");
    for (const [kind, words] of parts) all.append(make(tags[kind], words), " ");
    return all;
  };

  const card = (item) => {
    const box = make("article");
    box.className = "item";
    const score = item.score === null ? "" : `, score ${item.score}`;
    box.append(make("h3", `record ${item.n}${score}: ${item.voices.join(" ")}`));
    const list = make("dl");
    const row = (name, content) => {
      const value = make("dd");
      value.append(content);
      list.append(make("dt", name), value);
    };
    row("asked", item.asked);
    row("reference", item.reference);
    row("answer", item.answer || "(empty)");
    if (item.diff) row("change", difference(item.diff));
    if (item.judge) row("judge", item.judge);
    box.append(list);
    for (const source of item.audio) {
      const player = make("audio");
      player.controls = true;
      player.preload = "none";
      player.src = source;
      box.append(player);
    }
    return box;
  };

  const show = () => {
    fill(file, Object.keys(data[model.value] || {}));
    const chosen = (data[model.value] || {})[file.value] || [];
    items.replaceChildren(...chosen.map(card));
    if (!chosen.length) items.append(make("p", "No answers were kept (--examples 0)."));
  };
  fill(model, Object.keys(data));
  model.addEventListener("change", show);
  file.addEventListener("change", show);
  show();
})();
