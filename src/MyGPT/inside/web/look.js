// Look inside a model: keep the views of inside.js and walk.js up to date with the numbers of a source.
//
// The source computes them: a worker on the page of `mygpt explain --live`, or the server on that of `mygpt serve`.
//   source.inside(text, {heads_off})                    page_data in inside/page.py; the text as a string or as token ids
//   source.walk(ids, {layer, head, token, heads_off})   walk_data in inside/walk.py

class Look {
  // `onData` receives new numbers just before they are drawn. `onChange` is called when new numbers arrive, and when the reader
  // chooses something else. `onError` receives errors.
  constructor(source, { start = {}, onData = () => {}, onChange = () => {}, onError }) {
    Object.assign(this, { source, onData, onChange, onError, asked: [], ids: [], version: 0 });
    this.inside = new Inside({ start, onChoose: () => this.changed(), onSwitch: () => this.read(this.asked) });
    this.walk = new Walk({ step: start.step, onStep: onChange });
  }

  get headsOff() { return this.inside.headsOff; }
  get data() { return this.inside.data; }
  // The ids up to the chosen token.
  get chosenIds() { return this.data === null ? [] : this.ids.slice(0, this.inside.token + 1); }

  // Show how the model reads a text. The answers to older calls are dropped.
  async read(text) {
    const version = ++this.version, { headsOff, inside } = this;
    this.asked = text;
    try {
      const data = await this.source.inside(text, { heads_off: headsOff });
      if (version !== this.version) return;
      this.ids = data.tokens.map(({ id }) => id);
      inside.take(data);
      // A frame costs time, so one frame shows all changes, unless the walk takes long.
      const changed = this.changed();
      await Promise.race([changed, new Promise(resolve => setTimeout(resolve, 30))]);
      this.onData(this.data);
      inside.draw();
      await changed;
      if (version === this.version && headsOff.length && !inside.isCompared) {
        const allOn = await this.source.inside(this.ids, { heads_off: [] });
        if (version === this.version) inside.compare(allOn);
      }
    } catch (error) {
      if (version === this.version) this.onError(error);
    }
  }

  async changed() {
    this.onChange();
    const version = this.version, { layer, head, token } = this.inside, { ids, headsOff, data } = this;
    try {
      const walk = await this.source.walk(ids, { layer, head, token, heads_off: headsOff });
      const isChosen = layer === this.inside.layer && head === this.inside.head && token === this.inside.token;
      if (version === this.version && isChosen) this.walk.show(walk, data.tokens, headsOff);
    } catch (error) {
      if (version === this.version) this.onError(error);
    }
  }
}
