"""Answers that look alike and are not: signs, decimals, units, bounds, names, choices, polarity.

In the table: ? a question, = a gold answer, + what is right, - what is wrong.
"""

import pytest

from seal_jax.tasks.knowledge.grading import grade

TABLE = """
? What percentage of the voters agreed?
= 5.6 %
+ 5.6% | 5.6 percent | 5.6 per cent | 5,6 % | 5.60 % | It was 5.6 percent.
- 56 % | 56 | .56 % | 0.56 % | 5.6 km | -5.6 % | 5.7 %
= 56 %
+ 56 percent | 56 | fifty-six percent | about 56 % | 56.0 %
- 5.6 % | more than 56 % | 56-60 % | under 56 percent | 560 % | at least 56 percent

? How many moons does the planet have?
= 1.2
+ 1.20 | 1,2
- 12 | 1-2 | 1 or 2 | 0.12 | 1.2 million | -1.2 | 1.2.0
= 12
+ twelve | 12.0 | a dozen | Twelve moons. | about 12 | The planet has 12 moons. | exactly twelve
+ It has twelve. | 12 moons | Answer: 12 | 012 | some 12 moons
- 1.2 | 120 | more than 12 | at least 12 | up to 12 | less than 12 | 10-12 | 12 or 13 | 12, 13
- twelve or thirteen | 12 million | 12 % | -12 | 12th | 12/13 | over twelve | 12+ | 12 or more
- fewer than 12 | not 12 | twelve hundred | 1/2 | 21 | between 12 and 14 | no more than 12
- The planet has more than 12 moons. | 12 thousand | 12k | 12 km | 12 to 15 | 11
= more than 12
+ over 12 | more than twelve | > 12
- less than 12 | at most 12 | under 12 | up to 12

? How many people live in the town?
= 1200
+ 1,200 | 1 200 | twelve hundred | 1.2 thousand | one thousand two hundred | 1200 people | 1.2k
+ approximately 1,200 people
- 1.2 | 120 | 12,000 | 1200 % | 1,200,000 | 12 hundred thousand | 1.200,5
= 1.4 million
+ 1,400,000 | 1.4M | 1 400 000 | 1.400.000 | 1,4 million | one million four hundred thousand
+ About 1.4 million people live in the town.
- 1.4 | 14 million | 1.4 billion | 140,000 | 1.4 thousand | almost 1.4 million
= 500,000
+ half a million | 500 thousand | 500k | 0.5 million | five hundred thousand
- 500 | 5 million | 500 million | half a billion | 500,000 or 600,000

? What is the temperature at night?
= 40 °C
+ 40 degrees Celsius | 40C | 40 degrees | 104 °F | 40° C | +40 °C | forty degrees
- -40 °C | minus 40 °C | 40 °F | 40 below | 40 degrees below zero | 4.0 °C | negative 40
= -40
+ minus 40 | −40 | negative forty | 40 below | 40 below zero | -40 degrees | –40 °C
+ 40 degrees below zero | minus forty degrees
- 40 | +40 | 4.0 | forty | 3-40 | -4 | -400 | above 40

? Which pages were lost?
= 3-40
+ pages 3-40 | 3 to 40 | 3–40 | pages 3 to 40 | from 3 to 40 | Pages 3 through 40 were lost.
- -40 | 340 | 3.40 | 40 | 3 or 40 | 30-40 | 40-3
= 40
+ page 40 | forty | 40.
- pages 3-40 | 3-40 | 40-45 | 400

? How much did the bridge cost?
= $340
+ 340 dollars | $340.00 | US$340 | 340 | 340 USD | $ 340 | three hundred and forty dollars
- €340 | £340 | 340 euros | $3.40 | $340 million | 34 dollars | 340 pounds | 340 % | 340 cents
- more than $340
= $1.4 million
+ $1.4m | 1.4 million dollars | $1,400,000 | 1,400,000 dollars
- $1.4 billion | $1.4 | €1.4 million | $14 million | $1.4k

? How far is it from the mill to the sea?
= 12 kilometers
+ 12 km | 12 kilometres | twelve kilometers | 12,000 m | 7.5 miles | 12km | 12 | It is 12 km.
+ about 12 kilometers
- 12 miles | 12 m | 12 meters | 12 kg | 1.2 km | 12 km/h | 12 square kilometers | 12 hours
- 12 or 15 km

? How heavy is the bell?
= 300 kg
+ 300 kilograms | 0.3 tonnes | 300 kilos | three hundred kilograms | 661 lb
- 300 pounds | 300 g | 300 lbs | 300 tons | 30 kg | 300 km | 300 mg

? How long did the journey take?
= 90 minutes
+ 1.5 hours | ninety minutes | 90 min
- 90 seconds | 90 hours | 9 minutes | 90 days

? How many miles is the road?
= 12
+ 12 miles | twelve miles
- 12 km | 12 kilometers | 12 feet

? In which year did the bridge collapse?
= 1923
+ in 1923 | 1923 AD | AD 1923 | The bridge collapsed in 1923. | ca. 1923 | about 1923 | 1923 CE
+ not until 1923 | nineteen twenty-three | It collapsed in 1923. | approximately 1923
+ the year 1923 | in May 1923 | early 1923 | only in 1923 | circa 1923 | 17 May 1923
- before 1923 | 1923 BC | after 1923 | 1923 B.C. | 1923 BCE | since 1923 | until 1923 | by 1923
- the 1920s | 1923 or 1924 | prior to 1923 | 1932 | 1923-1925 | 1923 or so, or 1930
- no later than 1923 | It collapsed before 1923. | 1920s | in 1923 or 1924 | between 1923 and 1925
- not in 1923 | 1923 B.C.E. | before the end of 1923 | It collapsed after 1923.
- either 1922 or 1923 | 192 | 19233
= 44 BC
+ 44 BCE | 44 B.C. | in 44 BC | 44 before Christ
- 44 AD | 44 | 44 CE | AD 44 | before 44 BC | 440 BC

? When did the mill open?
= 1923
+ It did not open until 1923. | as late as 1923 | 1923, not 1932 | 1923 rather than 1924
- sometime after 1923 | before or after 1923 | at the latest by 1923 | 1932, not 1923 | 1922/1923
= the 1960s
+ the sixties | the '60s | the 60s
- the 1860s | the fifties | 1970

? How long did the war last?
= 30 years
+ thirty years | three decades | 360 months
- over 30 years | up to 30 years | 30 months | 30 days

? In which language is it written?
= C++
+ c++ | It is written in C++.
- C | C#

? Which vitamin is it?
= vitamin A
+ vitamin a | Vitamin A.
- vitamin | vitamin B

? What is the interest rate?
= 0.5 percent
+ half a percent | .5 % | 0,5 %
- 5 percent | 50 % | .05 %

? Did the king agree?
= yes
+ The king agreed. | He did. | without doubt
- The king did not agree. | He didn't. | the king never agreed
= no
+ The king never agreed. | He didn't. | by no means
- The king agreed. | no doubt he agreed | not only did he agree, he paid

? When did the bridge collapse?
= March 1999
+ in March 1999 | Mar 1999
- May 1999 | in May 1999 | March 1998 | May of 1999
= January 7, 2015
+ 7 January 2015 | 2015-01-07 | January 7th, 2015 | Jan 7, 2015 | on the 7th of January 2015
+ 1/7/2015
- January 8, 2015 | July 7, 2015 | January 7, 2016 | before January 7, 2015 | January 17, 2015
= the 1920s
+ 1920s | the 1920's | in the 1920s
- the 1930s | 1930 | the 1820s

? In which century was it built?
= the 19th century
+ 19th century | the nineteenth century | in the 19th century | the 1800s
- the 18th century | 19th century BC | the 20th century | the 1900s | the ninth century

? Which place did she take?
= third
+ 3rd | the third | third place | 3rd place
- fourth | 13th | thirtieth | 2nd | second

? What part of the harvest was lost?
= two thirds
+ 2/3 | two-thirds | two thirds of the harvest | 66.7 %
- one third | a third | 3/2 | two | 23 | 33 %
= half
+ 1/2 | 50 % | one half | a half | half of the harvest | 50 percent
- a quarter | one third | 12 | 5 %

? When does the ferry leave?
= 5:30 pm
+ 17:30 | 5:30 p.m. | at 5:30 PM | 5:30
- 5:30 am | 5:30 a.m. | 3:50 pm | 530 | after 5:30 pm | 5:13 pm

? What was the final score?
= 3:2
+ 3-2 | 3 to 2 | 3–2 | 3:2.
- 2:3 | 32 | 3:12 | 3 | 3.2

? Which country sold the islands?
= Niger
+ niger | The country is Niger. | Niger sold the islands.
- Nigeria | nigeria | The Nigerians | Algeria | Nigeria sold the islands.
= Nigeria
+ The Nigerians | Nigeria. | the Nigerian government
- Niger | Algeria | The Nigeriens
= Austria
+ The Austrians | Austria sold them.
- Australia | the Australians | Australia sold the islands.
= Iran
+ Iran.
- Iraq | Ireland | Iraq.
= Guinea
+ Guinea.
- Guinea-Bissau | Equatorial Guinea | Papua New Guinea | Guyana | New Guinea
= Sudan
+ Sudan | The Sudanese
- South Sudan | Sweden
= Korea
+ Korea.
- North Korea | South Korea | north korea
= North Korea
+ north korea | It was North Korea.
- South Korea | Korea
= Mali
+ Mali.
- Malawi | Malta | Somalia
= Slovakia
+ Slovakia
- Slovenia | Slovenija
= Ireland
+ The Irish | Ireland.
- Northern Ireland | Iceland
= Mexico
+ mexico
- New Mexico | Mexico City

? Where was the treaty signed?
= York
+ In York. | york
- New York | New York City | in New York
= New York
+ New York City | in New York
- York | New Jersey
= London
+ London, England | It was signed in London.
- Londonderry | New London
= Alexandria
+ Alexandria.
- Alexander

? Who painted the ceiling?
= John
+ John.
- Johnson | John's brother | Johnny Smith's wife
= Victor
+ Victor
- Victoria
= Michelangelo Buonarroti
+ Buonarroti | Michelangelo Buonarroti, the brother of Matteo | Michelangelo Buonarotti
- Michelangelo Buonarroti's brother | the brother of Michelangelo Buonarroti
- Michelangelo's pupil | a student of Michelangelo | Michelangelo's younger brother
- the wife of Michelangelo | the son of Michelangelo Buonarroti
- Matteo, the brother of Michelangelo
= Alexander
+ Alexander | Alexander, the brother of Paul | his brother Alexander | Paul's brother Alexander
- Alexander's brother | wife of Alexander | Alexander Jr. | Alexander II
- Alexander's brother Paul | the daughter of Alexander | Alexander's successor
- the father of Alexander
= Alexander's brother
+ the brother of Alexander | Alexander's brother.
- Alexander | Alexander's sister

? Which king built the tower?
= Henry VIII
+ Henry the Eighth | King Henry VIII | Henry VIII.
- Henry VII | Henry II | Henry the Seventh
= Henry
+ King Henry
- Henry II | Henry's son | the successor of Henry

? Who painted the ceiling?
= the president
+ The president. | the president of the club
- the vice president | the ex-president | the vice-president | the president's wife

? What is the coin made of?
= copper
+ copper | It is made of copper. | copper, not tin | copper rather than tin
+ copper instead of tin | not tin but copper | only copper | pure copper | Copper, I think.
+ no doubt copper
- copper or tin | tin or copper | either copper or tin | copper, tin or iron | copper/tin
- possibly copper, maybe tin | not copper | tin, not copper | tin rather than copper
- tin instead of copper | It isn't copper | It is not copper. | never copper | anything but copper
- It is made of copper or tin. | It could be copper or tin | copper? tin?
- maybe copper or maybe tin | iron, copper or tin | not copper but tin | unknown
- copper or something else | It's either tin or copper. | perhaps copper, perhaps tin
- copper (or tin) | copper / tin | copper vs tin | tin, or copper
= copper or tin
+ copper or tin | tin or copper | It is made of copper or tin. | either copper or tin
- iron | gold or silver
= copper and tin
+ tin and copper | copper and tin.
- copper or tin | neither copper nor tin

? Who painted the ceiling?
= Ada
+ Ada, not Mary | It was Ada. | Ada rather than Mary | not only Ada | none other than Ada
- Ada or Mary | Mary or Ada | Mary, not Ada | not Ada | Mary rather than Ada | anyone but Ada
- it wasn't Ada | Mary instead of Ada | either Mary or Ada | Ada is wrong

? Is the museum open?
= no
+ no | No, it is closed. | It is not open. | It isn't. | nope | false | of course not
+ certainly not | never | It is not. | The museum isn't open. | not open | no, it isn't
+ not at all | It is false.
- no doubt it is open | yes | It is open. | true | certainly | not only is it open, it is free
- Yes, it is not closed. | unknown | yes or no | without a doubt | no question, it is open | maybe
- of course | It is. | yes and no | The museum is open.
= yes
+ yes | yes, it is open | It is open. | no doubt it is open | no doubt | of course | true | It is.
+ certainly | indeed | without a doubt | The museum is open. | absolutely
+ not only is it open, it is free | It is true.
- no | It is not open. | it isn't open | false | certainly not | of course not | never | unknown
- No, it is open on Mondays only. | It isn't. | not open | The museum is not open. | not true
- yes and no | not really
= true
+ yes | True. | It is true | true
- false | no | not true
= false
+ no | False. | It is not true.
- true | yes | It is not false.

? How much did the museum pay for the painting?
= €2.4 million
+ EUR 2.4 million | It paid 2.4 million euros.
- The museum paid $2.4 million for it in the end. | It paid more than 2.4 million euros to heirs.

? What share of the students agreed?
= 45 %
+ 0.45 | 45 | 45 % of the students
- 45 students | 45 of them | Of all, 45 students agreed.
= one in five
+ 20 % | a fifth | 1/5
- one in ten | five

? How long is the canal?
= 120 km (75 mi)
+ 120 km | 75 miles | 120 kilometers (75 miles)
- 75 km | 120 miles

? When was the abbey founded?
= 1098
- The abbey was founded after 1098 by monks. | The abbey was not founded in 1098.
= before 1098
+ prior to 1098
- 1098 | after 1098
= 1936-1948
+ 1936–48 | from 1936 to 1948
- 1936–84 | 1936
= the late 1870s
+ in the late 1870s
- the early 1870s | the mid-1870s | 1870
= autumn 1286
+ in the autumn of 1286
- spring 1286 | winter 1286

? Where do the birds nest?
= the southern coast
+ on the southern coast
- the northern coast | the south-eastern coast
= Monroe
+ the city of Monroe
- near Monroe | Monroe Heights | outside Monroe

? Who commanded the regiment?
= Monroe
+ James Monroe | General Monroe | It was Monroe.
- Monroe County | Monroe's team | 1. Monroe 2. Grant 3. Lee | Monroe & Sons | Monroe did not
- Grant or Monroe commanded it. | Monroe refused to command it. | What did Monroe do?
- Nobody knows whether it was Monroe | Monroe, Grant and Lee
= George W. Hill
+ Hill | George Hill | It was commanded by Hill.
- George H. W. Hill | George W. Hill Jr. | George H. Hill | Hill's team
= Edward III
+ King Edward the Third commanded it.
- King Edward | Edward II | Edward III or Edward IV commanded it.

? Which element was found?
= carbon
- carbon dioxide | It was not carbon.
? Was the plan legal?
= no
+ hardly | not really
- No idea | not sure
? What was the contract?
= illegal
+ not legal
- legal | not illegal
? What does the coating do?
= reflects heat
- It does not reflect heat. | It never reflects heat.
"""


def read_table() -> list[tuple[str, str, str, bool]]:
    """Return (question, gold, answer, whether it is right)."""
    cases, question, gold = [], "", ""
    for line in filter(None, TABLE.splitlines()):
        sign, text = line[0], line[2:]
        if sign == "?":
            question = text
        elif sign == "=":
            gold = text
        else:
            cases += [(question, gold, answer, sign == "+") for answer in text.split(" | ")]
    return cases


CASES = read_table()
RIGHT = [case[:3] for case in CASES if case[3]]
WRONG = [case[:3] for case in CASES if not case[3]]


def test_the_table_is_large():
    assert len(RIGHT) > 200 and len(WRONG) > 300


@pytest.mark.parametrize(("question", "gold", "answer"), RIGHT)
def test_the_same_in_other_words_is_right(question, gold, answer):
    assert grade(question, gold, answer)


@pytest.mark.parametrize(("question", "gold", "answer"), WRONG)
def test_what_only_looks_like_the_gold_is_wrong(question, gold, answer):
    assert not grade(question, gold, answer)
