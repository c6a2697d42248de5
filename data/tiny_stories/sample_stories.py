"""The built-in corpus: small stories in the style of TinyStories (Eldan and Li, 2023), from a seeded grammar.

You can train on it without internet. Each plot is one text in which `[a|b|c]` is a choice, also between whole
paragraphs, and `{slot}` is a word that is drawn once per story, so that the same word is used throughout:

    {name} {kind} {he} {him} {his}  the hero, a child or an animal
    {friend} {fkind} {fhe} ...      the friend: a boy if the hero is a girl, so "he" is never ambiguous
    {parent} {phe} ...              mom, dad, grandma or grandpa
    {item} {thing}                  what the story is about, without and with its color: kite, red kite

A capitalized slot gives a capitalized word. The first paragraph names the hero and what the hero wants, and
the last one comes back to it, so that a small model can tell from a story's beginning how it continues.

    python data/tiny_stories/sample_stories.py      # prints three stories
"""

import random
import re

NAMES = {
    'child': {
        'he': 'Adam Alex Ben Bob Dan Eli Finn Hugo Jack Jay Joe Kai Leo Liam Luke Mark Max Nick Noah Oscar '
              'Owen Paul Peter Roy Sam Ted Theo Tim Toby Tom',
        'she': 'Ada Alice Amy Anna Beth Clara Dora Ella Emma Eva Gina Jane Julia Kate Lena Lily Lola Lucy '
               'Mary Maya Mia Molly Nina Nora Rita Ruby Sara Sue Tina Zoe',
    },
    'animal': {
        'he': 'Benny Bo Bobo Jojo Milo Nino Ollie Otto Pip Pogo Rocky Rolo Rusty Toto Ziggy',
        'she': 'Bella Bibi Coco Dot Fifi Hazel Kiki Lulu Mimi Momo Nelly Penny Pepper Tilly Trixie',
    },
}
PRONOUNS = {'he': 'he him his boy brother', 'she': 'she her her girl sister'}
ANIMALS = 'badger bear beaver fox hedgehog mouse otter rabbit raccoon squirrel'
PARENTS = {'mom': 'she', 'dad': 'he', 'grandma': 'she', 'grandpa': 'he'}
WORLDS = {  # tables of words, like those of the plots below
    'child': {
        'land': 'a quiet town|a town by the sea|a town near the hills',
        'place': 'the park|the meadow|the field',
        'hand': 'hand',
        'judge': 'teacher',
    },
    'animal': {
        'land': 'a green forest|a big forest|a quiet forest|an old forest',
        'place': 'the meadow|the field|the clearing',
        'hand': 'paw',
        'judge': 'old owl',
    },
}
PHRASES = {
    'once': '[Once upon a time, there was|Once there was|There was once|In {land}, there lived] '
            'a [little|young|small] {kind} named {name}',
    'oneday': '[One day|One morning|One afternoon|One fine day]',
    'thing': '{color} {item}',
    'sad': '[was very sad|began to cry|wanted to cry]',
    'glad': '[was very happy|jumped for joy|laughed with joy|smiled from ear to ear]',
}
COLORS = 'red|blue|green|yellow|orange|purple|pink|white'
TOYS = 'ball|doll|drum|puppet|robot|toy boat|toy car|toy duck|toy horse|toy train'
BOTH, CHILD, ANIMAL = ('child', 'animal'), ('child',), ('animal',)

# A plot is (heroes, tables, text). A story draws one entry of each table. A table is 'slot': 'word|word', or,
# if words depend on each other, 'slot slot': ['word / word', ...].
PLOTS = {
    'lost toy': (BOTH, {'item': TOYS, 'spot': 'by the old tree|near the gate|behind the big bush'}, """
{once} who had a {thing}.
[{name} took the {item} everywhere.|The {item} was {his} favorite thing.|{name} loved the {item} very much.]

{oneday}, the {item} was gone.
{name} looked [under the bed|on the shelf|in every box], but [{he} could not find it|it was not there].
{He} {sad}. "{Parent}, my {item} is gone!" {he} said. "[Don't cry|Don't worry], {name}.
[Let's look together|We will find it]," said {his} {parent}.

[Then {name} [remembered something|thought for a moment]. "I played {spot} yesterday!" {he} said.
They [ran|went] outside and looked {spot}.
There was the {item}, [a little wet|with a leaf on top|safe and sound]! {name} {glad}.
[From that day on|After that], {he} always took the {item} home [in the evening|before dinner].
|[Then they heard a happy laugh.|Then they heard a little voice.]
{name}'s baby {fsibling} sat [on the floor|on a blanket] and [held|hugged] the {item}.
"{Fhe} likes it too," said {Parent}. {name} [smiled|was not angry].
From that day on, {name} and {his} baby {fsibling} [shared|both played with] the {item}.
|Just then, {friend} from the next house came [to the door|in]. "Is this your {item}?
I found it {spot}," {fhe} said. {name} {glad}. "[Thank you|Thank you so much], {friend}!" {he} said.
Then {name} and {friend} played with the {item} [until dinner|in the garden] and became good friends.]
"""),
    'sharing': (BOTH, {'item': TOYS}, """
{once} who had a new {thing}.
{name} [loved the {item} very much|thought it was the best {item} of all|played with it every day].

{oneday}, {name} played with the {item} in {place}. {His} friend {friend} [came by|came over|saw it].
"[What a nice {item}|I like your {item}]! [Can I play with it|May I play too]?" asked {friend}.
"No, the {item} is mine!" said {name}.

[{friend} [was sad and went home|walked away with tears in {fhis} eyes].
[Soon|After a while], {name} felt lonely. {He} took the {item} and ran to {friend}'s house. "I am sorry.
You can play with my {item} too," {he} said.
|{friend} pulled at the {item}, and {name} pulled too. Splash! The {item} fell into the mud.
[They looked at each other.|They both stopped.] "I am sorry, {name}. Let's clean it together," said {friend}.
Soon the {item} was clean again. "I am sorry too, {friend}. You can play first," said {name}.]

{friend} [smiled|was happy again].
They [took turns|played and laughed] until [the sun went down|it was time for dinner].
[That day, {name} learned|Now {name} knew] that {his} {item} was [more|much more] fun with a friend.
"""),
    'the dark': (BOTH, {'item': 'toy cat|toy dog|toy duck|doll|toy lamb', 'sign truth': [
        'saw a big shadow on the wall / a coat on a chair',
        'heard a tap at the window / a branch in the wind',
        'saw two bright eyes at the window / a little owl in the tree',
        'heard a strange noise under the bed / a tiny frog',
        'saw something move by the window / the curtain in the wind',
    ]}, """
{once} who was afraid of the dark.
Every night, {name} took {his} {thing} to bed and [held it close|hugged it].

One night, {name} {sign}. [{His} heart beat fast.|{He} began to shake.]
{He} held the {item} tight and called, "{Parent}, {Parent}! [I am scared|There is a monster]!"
{His} {parent} came [with a small lamp|with a candle|and turned on the light].
"[Let's look together|Let's see what it is], {name}," {phe} said. It was only {truth}!
{name} [had to laugh|laughed out loud|felt much better].

"[The dark can play tricks on us|Things look strange in the dark]," said {Parent}.
"[Sleep well|Good night], {name}." {name} went back to bed with {his} {item}.
[The room was dark again, but {he} smiled.|{He} closed {his} eyes and smiled.]
From that night on, {name} was not afraid of the dark [anymore|any longer].
"""),
    'thunder': (BOTH, {'hide': 'under the table|behind the couch|in the corner|under a chair', 'act': [
        '{he} sang a song about a [funny|sleepy|happy] [duck|cow|pig]',
        '{he} told a story about a [brave|kind] [lion|king|fish]',
        '{he} made a little tent out of a {color} blanket',
    ]}, """
{once} who was afraid of thunder. {name} had a little {fsibling} named {friend}.

One [day|afternoon], [a big storm came|the sky turned black]. "Boom!" went the thunder.
{name} wanted to [hide under the bed|run away and hide]. But then {he} heard a [small|soft] cry.
{friend} was {hide}.

{name} was [still afraid|just as scared],
but {he} [sat down beside {friend}|took {friend}'s {hand}|put {his} arm around {friend}].
"[I am here with you|You are not alone|I will stay with you]," said {name}. Then {act}.
"Boom!" went the thunder again, but {friend} [did not cry anymore|only smiled at {name}].

[Soon|After a while], the storm was over, and [the sun came out|there was a rainbow in the sky].
"[You are so brave|You were very brave], {name}," said {friend}. {name} smiled.
{He} had helped {friend}, and {he} had forgotten to be afraid of the thunder.
"""),
    'new skill': (BOTH, {'skill fail advice done': [
        'ride a bike / The bike shook, and {name} fell / Keep your feet moving / {name} rode down the road',
        'swim / Water went up {his} nose / Kick your feet and breathe slowly / {name} swam across the pond',
        'skate / {His} feet slid away, and {he} fell / Bend your knees / {name} skated around the icy pond',
        'jump rope / The rope hit {his} feet / Jump when the rope comes down / {name} jumped ten times',
        'whistle / Only air came out of {his} mouth / Make your mouth round / A clear sound came out',
        'fly a kite / The kite fell to the ground / Run into the wind / The kite went high up in the sky',
        'catch a ball / The ball flew past {him} / Keep your eyes on the ball / {name} caught the ball',
    ]}, """
{once} who wanted to learn to {skill}. {His} friend {friend} could {skill} [very well|already].

{oneday}, {name} tried it. It was [hard|not easy]. {fail}. {He} tried again and again, but it did not work.
"I will never learn to {skill}!" said {name}. {He} [{sad}|wanted to give up].

{friend} [saw it and came over|came to help {him}].
"[It was hard for me too|I had to try many times too]," {fhe} said. "{advice}."
{name} [nodded|took a deep breath] and tried once more.
[{He} did what {friend} had said.|This time it was different.]

{done}! "[I did it|I can do it], {friend}!" {name} shouted. {friend} [clapped and cheered|jumped up and down].
{name} was [so proud|very proud], because now {he} could {skill}.
"""),
    'telling the truth': (BOTH, {
        'item': 'vase|cup|plate|lamp|bowl|jug',
        'hide': 'under {his} bed|behind the couch|in a box|under a blanket',
        'play played cause': [
            'play ball / played ball / {name} threw the ball too high, and it hit',
            'run / ran / {name} ran too fast and hit',
            'dance / danced / {name} turned around too fast and hit',
            'jump / jumped / {name} jumped too far and hit',
        ]}, """
{once} who loved to {play} in the house. "Please {play} outside," {his} {parent} [often|always] said.

{oneday}, {cause} {Parent}'s {thing}. Crash! The {item} [fell down and broke|fell to the floor and broke].
{name} was [scared|afraid] and hid the pieces of the {item} {hide}.

At dinner, {name} [could not eat|did not say a word]. "What is wrong?" asked {Parent}. "I broke your {item}.
[I am so sorry|I am very sorry]," said {name} [with tears in {his} eyes|in a small voice].
{Parent} gave {him} a hug. "[Thank you for telling me|I am glad that you told me] the truth," {phe} said.
Then {name} and {Parent} [mended the {item} with glue|glued the pieces together].
After that, {name} always told the truth, and {he} only {played} outside.
"""),
    'animal friend': (CHILD, {'spot': 'beside the road|behind the house|near a big tree|by the fence',
                              'pet trouble help later': [
        "bird / Its wing was stuck in a bush / {name} pulled the wing free / sang at {name}'s window",
        'kitten / It was wet and cold / {name} dried it with {his} scarf / waited for {name} at the door',
        'puppy / Its leg was stuck under a stone / {name} lifted the stone / came to play with {name}',
        'turtle / It lay on its back / {name} turned it over / came to the garden to see {name}',
        'duckling / It was lost / {name} carried it back to the pond / swam up to {name} at the pond',
        'squirrel / Its tail was stuck under a log / {name} lifted the log / sat on the fence with {name}',
    ]}, """
{once} who [wished for|wanted to have] an animal friend.
[But no animal ever came to {name}.|Every night, {name} looked at the stars and made this wish.]

{oneday}, {name} [saw|found] a little {pet} {spot}. {trouble}. [It looked very sad.|It shook with fear.]
"[Poor little {pet}|Oh, you poor {pet}]! [Don't be afraid|I will help you]," said {name}.
[Slowly|Carefully|Slowly and carefully], {help}.
[The {pet} was safe now|Now the {pet} felt better].

{name} ran home and told {his} {parent} about the {pet}.
"You have [a kind heart|a good heart], {name}," said {Parent}.
The next day, {name} [saw|met] the {pet} again, and it was [well and happy|happy to see {him}].
From then on, the {pet} {later} every day, and {name} had an animal friend.
"""),
    'race': (BOTH, {'item': 'ribbon|cup|medal|flag'}, """
{once} who wanted to win the big race. The [winner|fastest runner] would get a {thing}.

On the day of the race, {name} stood [next to|beside] {his} friend {friend}. "Ready, set, go!"
called the {judge}. {name} ran [like the wind|as fast as {he} could]. Soon {he} was in front.

Then {name} heard a cry. {friend} had fallen, and {fhis} [foot|leg|knee] hurt.
{name} [stopped|turned around] and ran back. "[Hold on to me|Take my {hand}|Lean on me], {friend}," {he} said.
"You are [more important|worth more to me] than a {item}."

{name} and {friend} walked to the finish line [together|side by side] and came in last.
"You have [the kindest|the best] heart of all, {name}," said the {judge}, and {name} got a {item} too.
{name} [was proud of|loved] the {item}, but most of all {he} was happy that {he} had helped {friend}.
"""),
    'present': (BOTH, {'item': 'hat|scarf|cup|teapot', 'gift make use': [
        'picture / painted a yellow sun over a little house / hung the picture on the wall',
        'card / cut a big heart out of red paper / put the card next to {phis} bed',
        'crown / tied pink and white flowers together / wore the crown all day',
        'bowl / made it out of clay and painted it blue / put the bowl on the table',
        'paper bird / folded a piece of paper again and again / put the paper bird in the window',
    ]}, """
{once} who wanted to give {his} {parent} a birthday present.

{name} went to the shop and saw a [nice|pretty|fine] {thing}. "Ten coins, please," said the shopkeeper.
{name} had only [one coin|two coins|three coins]. {He} {sad}.
On the way home, {he} [had an idea|stopped and smiled]. "I can make a {gift}!" said {name}. {He} {make}.
It took [a long time|all afternoon].

The next morning, {name} [ran to|woke] {his} {parent}. "Happy birthday, {Parent}!
I made you a {gift}," {he} said. "[It is beautiful|I love it], {name}!
[It is better than anything from a shop|Nobody else has a {gift} like this]!" said {Parent}.
{Phe} {use}, and {name} was [happy|proud|glad] that {he} had made the {gift}.
"""),
    'new friend': (BOTH, {
        'item': 'ball|toy car|hoop|toy truck|toy bus',
        'seat': 'under a tree|in the grass|on a stone|by a bush',
    }, """
{once} who had a {thing} but no one to play with.
[{name} had just moved and did not know anyone.|{name} lived in a new house and missed {his} old friends.]

{oneday}, {name} took the {item} to {place}. A {fkind} named {friend} sat alone {seat}.
{name} [wanted to say hello|wanted to talk to {fhim}], but {he} was too shy. Then the {item} rolled away.
It [stopped right in front of {friend}|came to a stop at {friend}'s feet].

"Is this your {item}? It is very [nice|pretty]!" said {friend}. "Yes, it is mine.
[Do you want|Would you like] to play with me?" asked {name}.
"[Yes, please|Yes, let's play|I would love to]!" said {friend}.

They played with the {item} until [the sun went down|it was time to go home].
{name} went home with {his} {item} and a big smile, because now {he} had [a friend|someone to play with].
"""),
    'garden': (BOTH, {'parent': 'grandma|grandpa', 'item big use': [
        'sunflower / taller than {name} / sat under the sunflower',
        'pumpkin / too big for {name} to carry / made soup from the pumpkin',
        'bean plant / full of green beans / made soup from the beans',
        'tomato plant / full of red tomatoes / ate the sweet tomatoes',
        'melon / bigger than a ball / ate the sweet melon in the sun',
    ]}, """
{once} who wanted to grow a {item}. {His} {parent} gave {him} a [tiny|small|little] seed.
{name} [put it in the ground|planted it in the garden] and gave it water.

Every morning, {name} ran to [look|the garden]. But there was [nothing to see|only brown earth]. {name} {sad}.
"[My seed does not want to grow! I will dig it up|I will never have a {item}! I will dig up the seed],"
{he} said. "[Wait|No, wait], {name}," said {his} {parent}. "[A seed needs time|Good things need time]."

So {name} waited and [sang to the seed|talked to the seed|watered the seed] every day.
Then, after a [warm|soft] rain, {he} saw [a little green leaf|something small and green]. "It is growing!"
shouted {name}.

[In the summer|At the end of summer], the {item} was {big}. {name} and {Parent} {use} together.
{name} was [happy|glad|proud] that {he} had waited for {his} {item}.
"""),
    'picnic': (BOTH, {
        'item': 'basket',
        'food': 'bread|cake|buns|sandwiches|pancakes',
        'rest': 'apples|berries|pears|cookies|plums',
        'spot': 'lake|hill|river|big tree',
    }, """
{once} who wanted to have a picnic with {his} friend {friend}.
{name} put [some|a lot of] {food} into a {thing}.

{oneday}, {name} and {friend} walked to the {spot}.
[They sat down, and {name} opened the {item}. It was empty!
[There was a big hole in the {item}.|The {item} had a big hole.] "Oh no!
The {food} fell out on the way," said {name}. {He} {sad}. "[Look|Look back there]!
The birds are having our picnic," said {friend} [and laughed|with a laugh].
|They put the {item} down and [ran around in the grass|played tag].
When they came back, a goat stood beside it. "Oh no! The goat ate all the {food}," said {name}. {He} {sad}.
"[Look! The goat|Look at the goat! It] is so full that it can't walk," said {friend}
[and laughed|with a laugh].]
"[Don't be sad|Don't worry], {name}. I have some {rest}."

{friend} gave {name} half of the {rest}. They [were sweet and good|tasted very good].
"Thank you, {friend}!" said {name}.
The {item} was empty, but {name} and {friend} [had a wonderful picnic|had the best picnic ever].
"""),
    'kite in a tree': (CHILD, {
        'item': 'kite',
        'try': 'jumped up high|threw a stick at it|pulled at the string|shook the tree',
    }, """
{once} who loved to fly {his} {thing}.
[{Parent} had made it for {him}.|It had a long tail.|It was the best kite in town.]

One windy day, {name} took the kite to the park. But then the kite [got stuck|was caught] in a tall tree.
{name} {try}, but the kite did not come down. {He} {sad}. "My kite is [lost|gone]!" {he} said.

[A {fkind} named {friend} [saw it|came by]. "[Don't cry|Don't be sad]. My dad has a long ladder," {fhe} said.
Soon {fhis} dad [got the ladder|came with the ladder], climbed up, and brought {name}'s kite down.
|A kind man from the next house [came by|came along] with a long pole. "[Let me help you|Don't worry],
{name}," he said. He pushed the {color} kite with the pole, this way and that way.
At last, it [came free|fell down].
|A little gray bird sat near the {color} kite. "Little bird, can you help me?" asked {name}.
The bird pulled at the string with its beak, [again and again|as hard as it could].
At last, the kite [came free|fell down].]

"Thank you, thank you!" said {name}. [The kite was not broken at all.|The kite had only a tiny hole.]
{name} ran [to the open field|far away from the trees], and the {item} [flew high|danced] in the sky again.
"""),
    'too proud': (BOTH, {'item mishap rescue': [
        "hat / the wind blew {name}'s hat into a pond / jumped into the water and brought it back",
        "scarf / {name}'s scarf got stuck in a bush, and {he} could not move / pulled it out of the bush",
        'coat / {name} fell into the mud in {his} new coat / pulled {him} out and cleaned the coat',
        "cap / the wind blew {name}'s cap up into a tree / got it down with a long stick",
    ]}, """
{once} who had a new {thing}. {name} was [very|too] proud of it.
"[Nobody has a {item} like mine|My {item} is the best of all]," {he} [told|said to] everyone.

{oneday}, {name} met a {fkind} named {friend} in {place}. {friend} had an old gray {item}.
"Your {item} is [old and ugly|not pretty at all]!" said {name} and laughed. {friend} [looked down|was hurt].
Just then, {mishap}. "[Help|Oh no], my {item}!" cried {name}.
{friend} [did not wait|came at once|did not think twice]. {Fhe} {rescue}.

{name} [felt bad|was ashamed]. "You helped me, but I was mean to you.
[I am sorry|Please forgive me], {friend}," {he} said. "[It is all right|I forgive you].
Let's be friends," said {friend}.
From that day on, {name} still [wore|liked] {his} {item}, but {he} never laughed at [anyone|others] again.
"""),
    'secret party': (BOTH, {'item': TOYS}, """
{once} who wanted a {thing} for {his} birthday.
[{name} dreamed of it every night.|{name} told everyone about it.]

On the morning of {his} birthday, nobody said, "Happy birthday!" {name} went to see {his} friend {friend}.
"I [can't play today|have no time today], {name}," said {friend} and [ran away|closed the door].
"[They have all forgotten my birthday|Nobody thinks of me today]," thought {name}. {He} {sad}.

In the evening, {name} [walked home slowly|went home alone]. The house was dark. {He} opened the door.
"Surprise!" shouted all {his} friends. "[We did not forget you|We knew what day it was], {name}.
The party was a secret!" said {friend}.

{friend} gave {name} a big box. Inside was the {item}! {name} {glad}.
"[It is just what I wanted|This is what I dreamed of]!" {he} said.
That night, {name} put the {item} next to {his} bed
and [looked at it again and again|fell asleep with a smile].
"""),
    'sick friend': (BOTH, {
        'item': 'balloon|toy cat|book|pillow|blanket',
        'game': 'splash in the pond|play hide and seek|run down the hill|play ball',
    }, """
{once} who had a good friend named {friend}. Every day, {name} and {friend} went out to {game}.

{oneday}, {friend} did not come. {name} waited [and waited|at the gate|for a long time].
"{friend} is sick and must stay in bed," said {his} {parent}. {name} [was worried|felt sad].
Then {he} had an idea. {He} took a {thing} and went to {friend}'s house.

{friend} lay in bed and [did not smile|looked tired].
"[This {item} is for you|I brought you this {item}], {friend}," said {name}.
{He} [sat by the bed and told funny stories|sat down and sang a song].
{friend} [laughed|smiled] for the first time that day.

After a [few days|week], {friend} was well again. "Your {item} made me feel better," {fhe} said.
Then {name} and {friend} went out to {game}, just like before.
"""),
    'snowman': (BOTH, {'item': 'hat|scarf|cap'}, """
{once} who wanted to build a snowman.
[Every day|All winter], {name} looked out of the window and waited for snow.

One [cold|winter] morning, everything was white. {name} put on {his} {thing}
and ran to {his} friend {friend}'s house. "[Come out|Come quickly], {friend}!
Let's build a snowman!" {he} shouted.
They rolled [three big balls|big balls] of snow, and {friend} brought a carrot for the nose.

"The snowman looks [cold|a little sad]," said {friend}. "[You can have|Take] my {item}, snowman," said {name}.
Now the snowman looked [happy|just right].

But then the days got warm, and the snowman [got smaller and smaller|melted away].
Only the {item} and the carrot were left. {name} {sad}.
"[Don't be sad|Don't worry], {name}. We will build another one," said {friend}.
{name} [picked up|took home] the {item} and kept it [safe|in a box] for the next snowman.
"""),
    'the way home': (ANIMAL, {'item': 'flower|feather|stone', 'guide sound': [
        'an old owl / I can see in the dark', 'a firefly / I have a little light',
        'a deer / I know every path', 'a bat / I fly here every night',
    ]}, """
{once} who wanted to find a {thing} for {his} {parent}.
"[Don't go too far|Stay near the house], {name}," said {Parent}.

{name} went [deep|far] into the forest.
At last, {he} saw the right {item} [beside a stream|in the grass|near an old tree]. {He} {glad}.
But then it got dark, and {he} did not know the way home.
{name} [held the {item} and cried|sat down with the {item} and cried].

Then {guide} came by. "[Why are you crying|What is the matter], little {kind}?" it asked.
"I am lost," said {name}. "[Don't be afraid|Come with me]. {sound}," it said, and {name} followed it home.

{His} {parent} [held {him} tight|gave {him} a big hug]. "[I am so sorry|I will never go so far again].
But look what I found," said {name}.
{Parent} put the {item} [in the window|on the table], and {name} was [happy|glad] to be home.
"""),
    'hat and nest': (BOTH, {
        'item': 'hat|cap',
        'parent': 'grandma|mom',
        'bird': 'robin|brown bird|little bird|gray bird',
    }, """
{once} who always wore {his} {thing}. {His} {parent} had made it.
[{name} wore it even in the rain.|{name} only took it off at night.]

One windy day, the wind took the {item} from {name}'s head and carried it [over the trees|far away].
{name} [ran after it, but the {item} was gone|looked for it, but {he} did not find it]. {He} {sad}.

[A week later|Some days later], {name} [saw|found] the {item} in a tree.
But a {bird} sat in it, on three small eggs. "[Please don't take it|Please let me stay].
This is my nest now," it said. {name} [thought about it|looked at the eggs].
"You can keep my {item}," {he} said.

"[That was very kind|You did the right thing], {name}," said {Parent} and made {him} a new {item}.
Soon, three baby birds [looked out of|sang in] the {item} in the tree,
and {name} [waved to them|smiled at them] every day.
"""),
    'the moon': (BOTH, {
        'item': 'bucket|bowl|pot',
        'try': 'climbed a high hill|stood on a big rock|stood on a high wall|sat on the roof',
    }, """
{once} who wanted to hold the moon. Every night, {name} looked up at it.
"It is so [bright|beautiful]," {he} said.

One night, {name} {try} and [reached up|held up both {hand}s].
But the moon was [still so far away|much too high]. {name} {sad}. "I will never hold the moon!" {he} said.

{His} friend {friend} [heard {him}|came by]. "[I have an idea|I know a way], {name}.
Come with me," {fhe} said. They went to the [pond|well], and {friend} filled a {thing} with water.
"[Look into the {item}|Look inside]," {fhe} said. {name} looked.
There was the moon, [round and bright|small and bright], in the {item}! {He} {glad}.

{name} put {his} {hand}s around the {item}.
"Now I can hold the moon, {friend}," {he} said, "and you can [hold it too|hold it with me]."
"""),
    'too small': (ANIMAL, {
        'kind fkind': ['mouse / bear', 'mouse / fox', 'mouse / badger', 'squirrel / bear'],
        'item': 'ring|key|coin|button',
        'hole': 'hole in the ground|crack between two rocks|hollow log',
    }, """
{once} who wanted to be big. {name} had a friend, a big {fkind} named {friend}.
"[I wish I were|I want to be] as big as you, {friend}," {name} [often said|said every day].

{oneday}, {friend} [came to {name} with tears in {fhis} eyes|was very sad].
"My {thing} fell into a {hole}," {fhe} said. "My paw is too big to get it out."
{name} went with {fhim} and looked in. It was very dark.

"I am small. I can go in," said {name}. {He} was afraid, but {he} [went in slowly|went deeper and deeper].
At last, {he} found the {item} and [brought it back|gave it back] to {friend}.

"[Thank you|You did it], {name}! [I could not do that|Nobody else could do that]," said {friend}.
"You are just the right size!" {friend} had the {item} back, and {name} did not want to be big anymore.
"""),
}


class Words(dict):
    """The words of a story, {slot: word}. A capitalized slot gives the capitalized word."""

    def __missing__(self, key):
        if key == key.lower():
            raise KeyError(key)
        word = self[key.lower()]
        return word[0].upper() + word[1:]


def expand(text, words, rng):
    """Replace every {slot} and every [a|b|c] in `text`, the innermost first, until none is left."""
    def pick(match):
        slot, choices = match.groups()
        if slot:
            return words[slot]
        return rng.choice(choices.split('|')).strip()

    while True:
        expanded = re.sub(r'\{(\w+)\}|\[([^][{}]*)\]', pick, text)
        if expanded == text:
            return text
        text = expanded


def draw_words(heroes, tables, rng):
    """Draw the words of one story. heroes: the worlds that the hero may come from, 'child' or 'animal'."""
    def pronouns(prefix, sex):
        keys = [prefix + key for key in ('he', 'him', 'his', 'kind', 'sibling')]
        words.update(zip(keys, PRONOUNS[sex].split(), strict=True))

    world = rng.choice(heroes)
    hero, friend = rng.sample(['he', 'she'], 2)
    words = Words(PHRASES)
    words['name'] = rng.choice(NAMES[world][hero].split())
    words['friend'] = rng.choice(NAMES[world][friend].split())
    pronouns('', hero)
    pronouns('f', friend)
    if world == 'animal':
        words['kind'], words['fkind'] = rng.sample(ANIMALS.split(), 2)
    tables = {'color': COLORS, 'parent': '|'.join(PARENTS)} | WORLDS[world] | tables
    for slots, entries in tables.items():
        if isinstance(entries, str):
            entries = entries.split('|')
        row = rng.choice(entries)
        words.update(zip(slots.split(), row.split(' / '), strict=True))
    pronouns('p', PARENTS[words['parent']])
    return words


def write_story(rng):
    """Write one story. Return its paragraphs, a list of str."""
    heroes, tables, text = rng.choice(list(PLOTS.values()))
    text = expand(text, draw_words(heroes, tables, rng), rng)
    text = re.sub(r'\b([Aa]) (?=[aeiou])', r'\1n ', text)  # a owl -> an owl
    return [' '.join(paragraph.split()) for paragraph in text.strip().split('\n\n')]


def stories(n, seed):
    """Yield `n` stories of 60 to 250 words. A blank line separates paragraphs, and no paragraph repeats.

    The same seed gives the same stories; a smaller `n` gives the first of them.
    """
    rng = random.Random(seed)
    seen = set()
    while n > 0:
        paragraphs = write_story(rng)
        if seen.isdisjoint(paragraphs):
            seen.update(paragraphs)
            n -= 1
            yield '\n\n'.join(paragraphs)


if __name__ == '__main__':
    print('\n\n---\n\n'.join(stories(3, random.randrange(10**6))))
