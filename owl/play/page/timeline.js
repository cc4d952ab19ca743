// The moments of a rollout as thumbnails, one row for each branch.

export class Timeline {
  // go(number): called with the moment that was chosen
  constructor(element, go) {
    Object.assign(this, { element, go, buttons: new Map(), rows: new Map(), run: null });
  }

  update(state) {
    const run = state.moments[0]?.number; // the first moment stays as long as its rollout
    if (run !== this.run) { // another rollout
      this.run = run;
      this.buttons.clear();
      this.rows.clear();
      this.element.replaceChildren();
    }
    const kept = new Set(state.moments.map((moment) => moment.number));
    for (const [number, button] of this.buttons) {
      if (kept.has(number)) continue;
      button.remove();
      this.buttons.delete(number);
    }
    for (const moment of state.moments) {
      if (!this.buttons.has(moment.number)) this.add(moment, state);
      this.buttons.get(moment.number).setAttribute("aria-current", moment.number === state.moment);
    }
    for (const [branch, row] of this.rows) row.classList.toggle("current", branch === state.branch);
    if (!state.paused) this.rows.get(state.branch)?.lastElementChild.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  add(moment, state) {
    if (!this.rows.has(moment.branch)) {
      const row = document.createElement("div"), name = document.createElement("b");
      row.className = "branch";
      name.textContent = moment.branch + 1;
      name.title = `Branch ${moment.branch + 1}`;
      row.append(name);
      this.rows.set(moment.branch, row);
      this.element.append(row);
    }
    const button = document.createElement("button"), picture = document.createElement("img"), label = document.createElement("span");
    const time = clock(moment.frame / state.fps);
    picture.src = `moments/${moment.number}.jpg`;
    picture.alt = "";
    label.textContent = time;
    button.setAttribute("aria-label", `Back to ${time}, branch ${moment.branch + 1}`);
    button.append(picture, label);
    button.addEventListener("click", () => this.go(moment.number));
    this.buttons.set(moment.number, button);
    this.rows.get(moment.branch).append(button);
  }

  // The last moment before a frame on the way to it, at least a third of a second back.
  before(state, frame) {
    const last = state.moments.find((moment) => moment.number === state.moment);
    return last && frame - last.frame < state.fps / 3 && last.parent !== null ? last.parent : last?.number;
  }
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}
