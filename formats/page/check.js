// Runs the model of a page under Node, for export.py. Each line of JSON on stdin is a question; the answer is
// a line of JSON on stdout. The first argument is the path of the page.
'use strict';

const fs = require('fs'), vm = require('vm');
const page = fs.readFileSync(process.argv[1], 'utf8');
const part = id => {
  const at = page.indexOf('>', page.indexOf(`id="${id}"`)) + 1;
  return page.slice(at, page.indexOf('</script>', at));
};
const script = new vm.Script(`${part('worker')}
  async (about, weights) => {
    await load({about, weights});
    return {
      logits: ({ids, positions}) => {
        const wanted = new Set(positions), rows = [];
        ids.forEach((id, t) => {
          const logits = model.forward(id, t, wanted.has(t));
          if (logits) rows.push(Array.from(logits));
        });
        return rows;
      },
      encode: ({text}) => [tokenizer.delimiter, ...tokenizer.encode(text)],
      decode: ({ids}) => tokenizer.decode(ids),
      write: ({ids, ...settings}) => Array.from(model.write(ids, settings)).filter(Boolean),
    };
  }`);
globalThis.postMessage = () => {};
const answers = script.runInThisContext()(JSON.parse(part('about')), part('weights'));
require('readline').createInterface({input: process.stdin}).on('line', async line => {
  const question = JSON.parse(line);
  console.log(JSON.stringify((await answers)[question.ask](question)));
});
