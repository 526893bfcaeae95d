"use strict";
// The list of answers. Texts only ever become text nodes, so nothing in a prompt or an answer can act.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const PER_PAGE = 20;
  let shown = [];
  let page = 0;

  const element = (name, className, ...children) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };

  const option = (value, text) => {
    const made = element("option", "", text);
    made.value = value;
    return made;
  };

  const lower = data.prompts.map((prompt, place) =>
    [prompt, ...data.policies.map((policy) => policy.answers[place])].map((text) => text.toLowerCase()));

  const pair = () => data.pairs[Number(at("pair").value)];

  // What the winners' letters and the flips mean for the pair that is chosen.
  const offerVerdicts = () => {
    const [first, second] = pair().policies.map((place) => data.policies[place].name);
    const chosen = at("verdict").value || "all";
    const count = (letter) => pair().winners.split(letter).length - 1;
    const flips = pair().flipped.filter(Boolean).length;
    const choices = [
      ["all", `any (${data.prompts.length})`],
      ["A", `${first} preferred (${count("A")})`],
      ["B", `${second} preferred (${count("B")})`],
      ["t", `tie (${count("t")})`],
      ["-", `no verdict (${count("-")})`],
      ["flipped", `changed with the order (${flips})`],
    ];
    at("verdict").replaceChildren(...choices.map(([value, text]) => option(value, text)));
    at("verdict").value = chosen;
  };

  const filter = () => {
    const wanted = at("verdict").value;
    const query = at("query").value.trim().toLowerCase();
    const { policies, winners, flipped } = pair();
    const texts = [0, ...policies.map((place) => place + 1)];
    shown = [];
    for (let place = 0; place < data.prompts.length; place++) {
      if (wanted === "flipped" ? !flipped[place] : wanted !== "all" && winners[place] !== wanted) continue;
      if (query && !texts.some((text) => lower[place][text].includes(query))) continue;
      shown.push(place);
    }
    page = 0;
    draw();
  };

  const article = (place) => {
    const { policies, winners, flipped, reasons } = pair();
    const winner = winners[place];
    const answers = element("div", "answers");
    policies.forEach((policy, side) => {
      const preferred = winner === "AB"[side];
      const { name, answers: texts } = data.policies[policy];
      const heading = element("h4", "", element("span", "name", name));
      if (preferred) heading.append(element("span", "tag", " · preferred"));
      const text = texts[place];
      answers.append(element("section", preferred ? "preferred" : "", heading,
        element("p", text ? "answer" : "answer empty", text || "(empty)")));
    });
    const outcome = { A: "", B: "", t: " · tie", "-": " · no verdict" }[winner]
      + (flipped[place] ? " · changed with the order" : "");
    const made = element("article", "", element("h3", "", `Prompt ${place + 1}${outcome}`),
      element("p", "prompt", data.prompts[place]), answers);
    if (reasons && reasons[place]) made.append(element("p", "reason", `Judge: ${reasons[place]}`));
    return made;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    at("list").replaceChildren(...shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(article));
    at("count").textContent = shown.length === 1 ? "1 prompt" : `${shown.length} prompts`;
    at("page").textContent = `page ${page + 1} of ${pages}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page === pages - 1;
  };

  const turn = (by) => {
    page += by;
    draw();
    at("answers").scrollIntoView();
  };

  at("pair").append(...data.pairs.map(({ policies }, place) =>
    option(place, policies.map((policy) => data.policies[policy].name).join(" and "))));
  at("pair").addEventListener("change", () => { offerVerdicts(); filter(); });
  at("verdict").addEventListener("change", filter);
  let waiting;
  at("query").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  at("previous").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  for (const cell of document.querySelectorAll("button[data-pair]")) {
    cell.addEventListener("click", () => {
      at("pair").value = cell.dataset.pair;
      at("verdict").value = "all";
      offerVerdicts();
      filter();
      at("answers").scrollIntoView();
      at("pair").focus({ preventScroll: true });
    });
  }
  offerVerdicts();
  filter();
})();
